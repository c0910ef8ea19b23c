"""Published methods to set beside the polar code, each from its paper, behind one interface."""
