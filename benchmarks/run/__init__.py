"""What measures or checks: each module is run by itself."""
