"""Who runs the supervisor of each host: ssh, systemd, Slurm, Kubernetes, Ray.

Each of them runs `triptych up FILE --host NAME` on a machine, and again when it ends or the machine is lost. None
carries a message or a tensor of the system, or restarts one of its roles.

| module | what |
| --- | --- |
| `ssh` | `triptych up FILE --ssh`: one ssh for each host |
| `kubernetes` | the objects of `triptych manifests FILE`, from a topology |
| `service_manager` | what systemd, or a probe of Kubernetes, is told of a supervisor |
| `placed_process`, `ray_plan`, `ray_agent`, `ray` | an agent of Ray for each host, and the process that it runs |
"""
