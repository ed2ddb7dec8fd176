"""The laws that vqcore asks of a modality and a quantizer; this is all a plugin's test file needs."""

from vqcore_pose.walks import Walks

from vqcore.testing.conformance import ModalityConformance, QuantizerConformance


class TestSigns(QuantizerConformance):
    component = "pose/signs"
    configs = ({}, {"bits": 1, "groups": 3})


class TestKeypoints(ModalityConformance):
    component = "pose/keypoints"
    size = (32,)

    def source(self):
        data = Walks.Config(name="pose/walks", modality=None)
        return Walks(data, split="train", modality=None, extra={}).get(3)
