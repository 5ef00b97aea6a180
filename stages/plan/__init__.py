"""Plans: will a run fit, how long will it take, how much traffic."""
