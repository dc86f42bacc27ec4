"""Makes the model bundles of the AIC codecs out of packages of the registry. `make.sh` runs it; docs/models.md describes what comes out."""
