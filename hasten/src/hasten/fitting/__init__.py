"""Everything that learns: calibrations, LEAP's fit, schedules of computed steps, small token models."""
