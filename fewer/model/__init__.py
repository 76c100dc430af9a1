"""The network: one configurable decoder and what one step of it takes and gives. It knows no method."""
