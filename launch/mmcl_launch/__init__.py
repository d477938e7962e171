"""How a run is described, put together and started."""
