"""From the arguments of a public call to one backend."""
