"""Words everybody uses: requests, messages, specs, plans, errors. No torch, no I/O beyond reading a config file."""
