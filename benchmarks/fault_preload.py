"""What a driver imports before it does anything: loaded once, in the process that drivers are forked from."""

import transformers.models.auto  # noqa: F401

import rayinfer.inputs
import rayinfer.models.load
import rayinfer.pipelines.cli
import rayinfer.pipelines.report
import rayinfer.pipelines.run  # noqa: F401
