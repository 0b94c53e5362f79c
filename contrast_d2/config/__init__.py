"""Experiments: their files, overrides, detectron2's yaml configs, schedules."""
