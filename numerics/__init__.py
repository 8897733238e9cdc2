"""How exactly a device computes, for all other packages."""
