"""Training of one stage. DeepSpeed is imported by ``engine`` alone, Ray nowhere."""
