"""Files -> arrays with their geometry."""
