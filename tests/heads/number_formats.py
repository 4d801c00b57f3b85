"""What a head gives compiled, in double precision and in bfloat16 is what it gives in float32."""

import torch


def assert_formats_agree(head, taps, target):
    with torch.no_grad():
        expected = head(taps, target)
        compiled = torch.compile(head, backend="aot_eager", fullgraph=True)(taps, target)
        with torch.autocast("cpu", torch.bfloat16):
            half = head(taps, target)
        wide = head.double()(taps.to(torch.float64), target)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(wide.float(), expected, rtol=1e-3, atol=1e-3)
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()
