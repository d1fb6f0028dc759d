"""Tables and pictures of the documents, from results."""
