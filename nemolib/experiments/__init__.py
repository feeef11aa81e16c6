"""One module for each notebook: what it computes, draws and claims, in its order."""
