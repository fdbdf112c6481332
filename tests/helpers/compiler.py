"""A mark for tests in which torch.compile makes code."""

from __future__ import annotations

import pytest

from kontext_core.models import regional

needs_compiler = pytest.mark.skipif(
    regional.compiler_problem("cpu") is not None, reason="needs a C++ compiler, as torch.compile does"
)
