"""What reading YAML can raise, in a module of its own: the chat needs it without the pipeline's configuration."""

import yaml

# PyYAML's constructors fail each in their own way on what they cannot build: '!!int', '!!timestamp x', '{[]: 1}'.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
