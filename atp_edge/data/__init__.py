"""Text: documents, splits without a document in common, token blocks."""
