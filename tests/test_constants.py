import torch

from activation_beacon.constants import constant


def test_a_tensor_is_made_once_for_each_device_and_dtype():
    here = torch.device("cpu")
    assert constant((1, 2), here) is constant((1, 2), here)
    assert constant((1, 2), here).tolist() == [1, 2]
    assert constant((1, 2), here, torch.float32).dtype == torch.float32
    assert constant((1, 2), torch.device("meta")).device.type == "meta"


def test_one_that_was_first_asked_for_without_gradients_serves_with_them():
    with torch.inference_mode():
        index = constant((2, 0, 7), torch.device("cpu"))
    weight = torch.arange(8.0, requires_grad=True)
    (weight.index_select(0, index) ** 2).sum().backward()
    assert weight.grad.tolist() == [0, 0, 4, 0, 0, 0, 0, 14]
