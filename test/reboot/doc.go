// Package reboot holds the tests of a node that reboots: a virtual machine with
// Debian's systemd, containerd, the kubelet and pods on a disk that stays,
// booted with one kernel after the other. The pods are static, or those of an
// API server beside the machine. The tests run outside of the machine and know
// of its pods what the pods tell over the network and in their logs.
//
// `make test-reboot` runs them; see run for the knobs.
package reboot
