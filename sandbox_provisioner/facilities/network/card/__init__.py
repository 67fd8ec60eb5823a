"""card - in the launching process of a root server: a network card for one sandbox.

::

    host                                               the box's own network namespace
    sbxc-64400005  ──────────── veth pair ──────────── eth0  100.64.0.5/32
      100.64.0.5/32 dev sbxc-64400005                    default via 169.254.1.1 dev eth0 onlink
      neighbours are fixed on both sides: no ARP is spoken, none is heard
      TBF: what the box receives                         TBF: what the box sends

    inet sandbox_provisioner    where it comes from, with whom it may speak, how much: `ruleset.py`
    a rule for the pool         what that table has not let through goes nowhere: `links.py`

The pair is made with one end in the box already. So it ends with the box, whoever was killed; what
is left in the table is swept. (To move an end of a pair that was made ahead takes 16 ms, to make
one there 1 ms: dev_change_net_namespace() waits for all CPUs.)

The name on the host tells the address: two servers cannot give out the same one, since Linux makes
no two interfaces of one name.
"""
