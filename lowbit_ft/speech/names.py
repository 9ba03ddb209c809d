"""The names of the codec in config.json and in transformers."""

MODEL_TYPE = "speech_codec"  # of config.json
AUTO = "AutoModelForAudioTokenization"  # the auto class of transformers that builds it
