"""The towers, the connectors, and DreamLLM as their composition."""
