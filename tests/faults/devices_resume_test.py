"""A run on several devices that is stopped, and goes on on as many or on fewer."""

import numpy as np
import scripts


def test_stages_on_two_devices_resume_on_two_and_on_one(tmp_path):
    scripts.run_devices_program(tmp_path, "stages")
    with (
        np.load(tmp_path / "straight.npz") as one,
        np.load(tmp_path / "stopped.npz") as other,
    ):
        straight, stopped = dict(one), dict(other)
    assert set(straight) == set(stopped)
    for name, expected in straight.items():
        if "['pretrained']" in name:  # On two devices before and after.
            np.testing.assert_array_equal(expected, stopped[name], err_msg=name)
        else:
            np.testing.assert_allclose(
                expected, stopped[name], rtol=1e-4, atol=1e-5, err_msg=name
            )
