"""Speech: sound becomes a few tokens a second, and tokens become sound again.

    wav -> mel [F, M], 50 frames a second -> encoder -> a code for 8 frames (vector_codes/): 6.25 a second
    codes, text, a prompt -> decoder, asked some times over -> mel -> wav

The codec is a model of transformers like any other once `register` has told its auto classes: a folder with
config.json and safetensors, whose linears a recipe packs, adapts and merges (task: speech_tokens).

    wav.py     files of sound, rates, channels      mel.py    the spectrogram, and back (Griffin-Lim)
    config.py  what config.json says                codec.py  the model, TaDiCodec (arXiv 2508.16790) in small
    sample.py  encode, decode with guidance         files.py  codes in a file
    names.py, register.py   what transformers is told of the model, and when
"""
