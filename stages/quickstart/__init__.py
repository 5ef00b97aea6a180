"""The quickstart: both stages on drawn scenes with the shipped mini towers."""
