"""Speed and memory: on paper and measured."""
