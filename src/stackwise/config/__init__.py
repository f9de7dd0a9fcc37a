"""The typed configuration: YAML, inheritance, overrides, error reports and named presets."""
