"""Every setting: adapters, training, federation, privacy, recipes; YAML files and overrides."""
