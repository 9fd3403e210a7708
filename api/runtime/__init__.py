"""RecOS: the operators of many queries share a few lanes, whatever the model. See graph.py, policy.py, runtime.py."""
