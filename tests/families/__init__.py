"""Every family of attention modules that is known by its class, on the real module of its library."""
