"""A hook of mkdocs: puts ``figures/`` into the site.

The folder stands beside ``docs/``, and pages link into it by paths that code hosts follow, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "figures"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in [*FIGURES.glob("*.svg"), *FIGURES.glob("*.png")]:
        name = f"figures/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\]\(\.\./((?:\.\./)*figures/)", r"](\1", markdown)
