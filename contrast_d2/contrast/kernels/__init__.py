"""How the InfoNCE and the reading of drawn pixels are computed, on each kind of device."""
