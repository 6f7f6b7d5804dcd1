"""Programs beside an update: ``doctor`` looks at a machine, ``simulate`` predicts an update."""
