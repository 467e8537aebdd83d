"""The four steps: each file has one step's components and its words in HTML."""
