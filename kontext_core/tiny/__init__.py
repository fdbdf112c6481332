"""The synthetic world of kontext-tiny, its scorer, and the recipe of the bundled model."""
