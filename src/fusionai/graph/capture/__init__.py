"""Capture: torch modules become OP-DAGs. The only part of the graph plane that imports torch."""

from fusionai.graph.capture.captured import Captured
from fusionai.graph.capture.inputs import Role
from fusionai.graph.capture.modules import capture
from fusionai.graph.capture.transformers_models import capture_transformers

__all__ = ["Captured", "Role", "capture", "capture_transformers"]
