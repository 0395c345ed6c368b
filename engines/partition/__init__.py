"""How a pipeline is cut into stages: tasks, blocks, classic code, and stubs for components that are elsewhere."""
