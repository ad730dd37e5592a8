"""What many runs say together: the rate that each method is compared at, what the G-effect foretells, which tokens it is of."""
