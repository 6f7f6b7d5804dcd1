"""Draws the figures of the documentation, as SVG.

    python figures/draw.py                       # overview.svg, architecture.svg
    python figures/draw.py --trace trace.json    # pipeline.svg, from a trace of PS_TRACE

A figure of something measured is drawn from that measurement alone. Text and lines take the colour
of the page, so that they are readable on light and dark ones.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = ["#2f7bf0", "#22b573", "#f59e0b", "#a78bfa", "#f472b6", "#0d9488", "#94a3b8", "#ef4444"]
STYLE = """<style>
:root { color-scheme: light dark; }
text { font: 14px system-ui, sans-serif; fill: #1c2330; }
.small { font-size: 12px; fill: #5d6778; } .b { font-weight: 600; }
.box { fill: #ffffff; stroke: #9aa5b8; } .host { fill: #f1f4f9; stroke: #c6cedb; }
.line { stroke: #5d6778; fill: none; stroke-width: 1.5; } .head { fill: #5d6778; }
.bulk { stroke: #2f7bf0; fill: none; stroke-width: 3; } .bulkhead { fill: #2f7bf0; }
.inside { fill: #ffffff; font-size: 13px; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ef; } .small { fill: #9aa5b8; }
  .box { fill: #222a37; stroke: #5d6778; } .host { fill: #171d27; stroke: #39435a; }
  .line { stroke: #9aa5b8; } .head { fill: #9aa5b8; } .inside { fill: #ffffff; }
}
</style>
<defs>
<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8"
 orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker>
<marker id="b" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5"
 orient="auto-start-reverse"><path class="bulkhead" d="M0 0 8 4 0 8z"/></marker>
</defs>"""


class Drawing:
    """Shapes, one behind the other."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self._size = (width, height)
        self._parts = [f"<title>{escape(title)}</title>", STYLE]

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "box") -> None:
        """The first line is bold."""
        self._parts.append(
            f'<rect class="{kind}" x="{x}" y="{y}" width="{w}" height="{h}" rx="6"/>'
        )
        top = y + (22 if kind == "host" else h / 2 - 8 * len(lines) + 13)
        for number, line in enumerate(lines):
            self.text(x + w / 2, top + 17 * number, line, "b" if number == 0 else "small")

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        self._parts.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(self, path: str, bulk: bool = False) -> None:
        kind, head = ("bulk", "b") if bulk else ("line", "a")
        self._parts.append(f'<path class="{kind}" d="{path}" marker-end="url(#{head})"/>')

    def bar(self, x: float, y: float, w: float, h: float, colour: str, label: str) -> None:
        self._parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(w, 0.5):.2f}" height="{h}" rx="2" '
            f'fill="{colour}">'
            f"<title>{escape(label)}</title></rect>"
        )

    def save(self, path: Path) -> None:
        width, height = self._size
        body = "\n".join(self._parts)
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'role="img">\n{body}\n</svg>\n'
        )


def overview() -> Drawing:
    """The README's picture: where the bytes go, and what the engine does meanwhile."""
    drawing = Drawing(860, 372, "From a trainer into an inference engine that keeps running")
    drawing.box(8, 88, 132, 64, "trainer", "or files: step 42")
    drawing.box(196, 12, 196, 216, "host memory, pinned", kind="host")
    drawing.box(430, 12, 176, 216, "GPUs", kind="host")
    drawing.box(646, 12, 206, 216, "inference engine", kind="host")
    middle = 120
    for rank, y in ((0, 52), (1, 140)):
        drawing.box(
            212, y, 164, 72, f"server rank {rank}", f"part {rank + 1} of 2", "of all tensors"
        )
        drawing.box(446, y, 144, 72, "staging", "one bucket", "after the other")
        drawing.box(662, y, 174, 72, f"worker {rank}", "its shard", "of every tensor")
        drawing.arrow(f"M140 {middle} C170 {middle} 178 {y + 36} 208 {y + 36}", bulk=True)
        drawing.arrow(f"M376 {y + 36} H442", bulk=True)
        drawing.arrow(f"M590 {y + 36} H658", bulk=True)
    drawing.arrow("M590 102 C625 110 625 142 658 152", bulk=True)
    drawing.arrow("M590 162 C625 154 625 122 658 112", bulk=True)
    drawing.text(168, 250, "register", "small")
    drawing.text(411, 250, "pinned copies", "small")
    drawing.text(626, 250, "each worker loads its shard", "small")
    drawing.text(8, 284, "the engine's process, which is never restarted", "b", "start")
    for x, width, colour, words in (
        (8, 300, "#64748b", "serves step 41"),
        (308, 136, "#2f7bf0", "update"),
        (444, 408, "#168a56", "serves step 42"),
    ):
        drawing.bar(x, 296, width, 30, colour, words)
        drawing.text(x + width / 2, 316, words, "inside")
    drawing.text(8, 350, "time", "small", "start")
    drawing.arrow("M44 346 H852")
    return drawing


def architecture() -> Drawing:
    """One node with two ranks, and where the bytes go."""
    drawing = Drawing(860, 470, "Server ranks beside inference workers")
    drawing.box(10, 60, 840, 400, "a node", kind="host")
    drawing.box(330, 5, 200, 40, "trainer, or files")
    for rank, x in ((0, 40), (1, 460)):
        server, device = (x, x + 200) if rank == 0 else (x + 200, x)  # devices face each other
        drawing.box(x, 100, 360, 60, f"host memory of rank {rank}", "its part of the checkpoint")
        drawing.box(server, 205, 160, 60, f"server rank {rank}", "ParameterServer")
        drawing.box(device, 205, 160, 60, "double buffer", "on the device, 2 buckets")
        drawing.box(device, 310, 160, 60, f"inference worker {rank}", "its shard of the model")
        drawing.arrow(f"M{device + 80} 160 V203", bulk=True)
        drawing.arrow(f"M{device + 80} 265 V308", bulk=True)
        edge = device - 2 if rank == 0 else device + 162
        drawing.arrow(f"M{server + 80} 265 V340 H{edge}")
        drawing.text((server + 80 + edge) / 2, 332, "socket", "small")
        drawing.text(device + 88, 186, "host to device", "small", "start")
        drawing.text(device + 88, 291, "load_weights", "small", "start")
        drawing.arrow(f"M{device + 80} 398 V372")
    drawing.arrow("M390 45 C350 60 260 70 222 98", bulk=True)
    drawing.arrow("M470 45 C510 60 600 70 638 98", bulk=True)
    drawing.text(300, 92, "register", "small")
    drawing.arrow("M400 226 H458", bulk=True)
    drawing.arrow("M460 244 H402", bulk=True)
    drawing.text(430, 280, "broadcast", "small")
    drawing.box(240, 400, 380, 44, "inference engine: vLLM, SGLang, ...")
    drawing.arrow("M80 265 V422 H238")
    drawing.text(156, 414, "req_func, HTTP", "small")
    return drawing


def pipeline(trace: Path, seconds: float | None) -> Drawing:
    """The buckets in a trace: a row for each rank and stage, to scale.

    ``seconds``: only so much from the first bucket on.
    """
    events = _complete_events(json.loads(trace.read_text()))
    begin = min(event["ts"] for event in events)
    end = max(event["ts"] + event["dur"] for event in events)
    if seconds is not None:
        end = min(end, begin + seconds * 1e6)
    lanes: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ts"] < end:
            lanes[event["lane"]].append(event)
    names = sorted({event["stage"] for event in events})
    colours = {name: STAGES[place % len(STAGES)] for place, name in enumerate(names)}
    left, width, row = 200.0, 640.0, 26
    drawing = Drawing(left + width + 20, 60 + row * len(lanes), "An update, as measured")
    scale = width / (end - begin)
    for number, (lane, inside) in enumerate(lanes.items()):
        y = 10 + row * number
        drawing.text(left - 12, y + 14, lane, "small", "end")
        for event in inside:
            start, stop = event["ts"], min(event["ts"] + event["dur"], end)
            label = f"{event['name']}: {event['dur'] / 1e3:.3f} ms"
            colour = colours[event["stage"]]
            drawing.bar(
                left + (start - begin) * scale, y, (stop - start) * scale, row - 8, colour, label
            )
    bottom = 30 + row * len(lanes)
    drawing.text(left, bottom, "0", "small")
    drawing.text(left + width, bottom, f"{(end - begin) / 1e3:.1f} ms", "small", "end")
    return drawing


def _complete_events(trace: Any) -> list[dict[str, Any]]:
    """What is noted of buckets, each with its lane's name. Raises ``ValueError`` without any."""
    listed = trace["traceEvents"] if isinstance(trace, dict) else trace
    processes = {e["pid"]: e["args"]["name"] for e in listed if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in listed if e.get("name") == "thread_name"
    }
    events = []
    for event in listed:
        if event.get("ph") != "X" or event.get("cat") == "phases":
            continue
        pid, tid = event["pid"], event["tid"]
        stage = str(threads.get((pid, tid), tid))
        rank = processes.get(pid, f"rank {pid}").partition(" on ")[0]
        lane = f"{rank}: {stage}"
        events.append({**event, "lane": lane, "stage": stage})
    if not events:
        raise ValueError("the trace has no complete events")
    return sorted(events, key=lambda event: (event["pid"], event["tid"], event["ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a Chrome trace: draw the pipeline")
    parser.add_argument("--seconds", type=float, help="only the first of the trace")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the figures go")
    arguments = parser.parse_args()
    if arguments.trace is None:
        overview().save(arguments.folder / "overview.svg")
        architecture().save(arguments.folder / "architecture.svg")
    else:
        pipeline(arguments.trace, arguments.seconds).save(arguments.folder / "pipeline.svg")


if __name__ == "__main__":
    main()
