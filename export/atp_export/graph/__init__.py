"""The ONNX graph of a decoder."""

from atp_export.graph.export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx"]
