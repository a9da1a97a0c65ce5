"""The likely cause of a failure: known mistakes are simulated on the bare model, and short experiments are made."""
