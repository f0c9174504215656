"""A frame is made of the samples in its window alone."""

import torch

from speechbrain_bestrq.frontend import ConvSubsampling


def test_the_last_frames_do_not_change_with_silence_behind_them(toy):
    """Trap: windows reflect at the edges.

    Mutation: in frontend.py, LogMel._log_mel, ``(self.window // 2, self.window - self.window // 2))`` -> ``(self.window
    // 2, self.window - self.window // 2), mode="reflect")``.
    """
    frontend = toy.make_model(normalize="global").speech_encoder.frontend
    wavs = 0.1 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    frontend.measure([(wavs, None)])
    alone, _ = frontend(wavs[:, :9600])
    longer, _ = frontend(torch.nn.functional.pad(wavs[:, :9600], (0, 6400)))
    torch.testing.assert_close(longer[:, : alone.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_a_loud_moment_does_not_raise_the_floor_elsewhere(toy):
    """Trap: ``top_db`` looks at the whole utterance.

    Mutation: in frontend.py, LogMel._log_mel, ``.clamp(min=self.floor).log()`` -> ``.clamp(min=float((power @
    self.filters).max()) * 1e-8).log()``.
    """
    frontend = toy.make_model(normalize="global").speech_encoder.frontend
    wavs = 1e-3 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    frontend.measure([(wavs, None)])
    quiet, _ = frontend(wavs)
    wavs[:, :800] = 1.0 - 2.0 * (torch.arange(800) % 2)
    loud, _ = frontend(wavs)
    assert not torch.allclose(loud[:, :5], quiet[:, :5])
    torch.testing.assert_close(loud[:, 8:], quiet[:, 8:], rtol=1e-5, atol=1e-5)


def test_convolutions_see_zeros_beyond_the_edges():
    """Trap: convolutions reflect at the edges, and no stream or padded batch can equal them.

    Mutation: in frontend.py, ConvSubsampling.__init__, ``nn.Conv2d(1, first, kernel_size, stride=2, padding=kernel_size
    // 2)`` -> ``nn.Conv2d(1, first, kernel_size, stride=2, padding=kernel_size // 2, padding_mode="reflect")``.
    """
    torch.manual_seed(1)
    subsampling = ConvSubsampling(d_model=16, channels=(4, 4), kernel_size=5, dropout=0.0).eval()
    features = torch.randn(1, 40, 80)
    with torch.no_grad():
        alone = subsampling(features)
        padded = subsampling(torch.nn.functional.pad(features, (0, 0, 0, 12)), torch.tensor([10]))
    torch.testing.assert_close(padded[:, :10], alone, rtol=1e-5, atol=1e-6)
