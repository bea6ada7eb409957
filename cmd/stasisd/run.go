package main

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/containerd/log"

	"github.com/stasis-containers/stasis/nri"
	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

var twoDigits = regexp.MustCompile(`^[0-9]{2}$`)

// run parses the arguments and is the daemon until ctx ends.
func run(ctx context.Context, args []string) error {
	var c nri.Config
	var level, format, memory string
	cmd := &cobra.Command{
		Use:   "stasisd",
		Short: "Decide which containers of this node are dumped and restored",
		Long: `stasisd is the node's daemon of stasis. It connects to containerd as an NRI
plugin, annotates the containers whose pods opted in, names the checkpoint that
each begins from, removes old checkpoints, and serves metrics.

It waits for containerd where that is absent or restarts. Containers that are
created while stasisd is down are ordinary ones.

After a reboot that the node was prepared for (stasis prepare-reboot) it reports
which containers are restored, which are waited for, and which began cold. With
--inhibit-shutdown it prepares the node itself when it is shut down.

The socket in the runtime directory serves HTTP: /metrics, /healthz, /status.
Under systemd it reports readiness and answers the watchdog.`,
		Example: `  stasisd
  stasisd --ttl 24h --max-bytes 107374182400 --metrics-address 127.0.0.1:9464`,
		Args:          cobra.NoArgs,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := setupLog(level, format); err != nil {
				return err
			}
			switch {
			case !twoDigits.MatchString(c.PluginIndex):
				return fmt.Errorf("--plugin-index %q: want two digits", c.PluginIndex)
			case c.GCInterval < time.Second:
				return fmt.Errorf("--gc-interval %v: want at least 1s", c.GCInterval)
			case c.GC.TTL < 0 || c.GC.MaxBytes < 0 || c.GC.MaxCount < 0 || c.GC.KeepPerIdentity < 0:
				return fmt.Errorf("a limit must not be negative; 0 means none")
			}
			c.Memory = checkpoint.Memory(memory)
			if err := c.Memory.Validate(); err != nil {
				return fmt.Errorf("--memory: %w", err)
			}
			c.Version, c.MaxLogBytes = version, 16<<20
			return nri.Run(cmd.Context(), c)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Root, "root", "/var/lib/stasis", "directory of the store")
	f.StringVar(&c.RuntimeDir, "runtime-dir", "/run/stasis", "directory of the daemon's socket and of what shims share until a reboot")
	f.StringVar(&c.NRISocket, "nri-socket", "/var/run/nri/nri.sock", "containerd's NRI socket")
	f.StringVar(&c.PluginIndex, "plugin-index", "90", "place among the NRI plugins, two digits")
	f.DurationVar(&c.GC.TTL, "ttl", 72*time.Hour, "remove checkpoints that are older; 0 keeps them")
	f.Int64Var(&c.GC.MaxBytes, "max-bytes", 0, "remove the oldest checkpoints beyond this many bytes; 0 for no limit")
	f.IntVar(&c.GC.MaxCount, "max-count", 0, "remove the oldest checkpoints beyond this many; 0 for no limit")
	f.IntVar(&c.GC.KeepPerIdentity, "keep", 2, "remove all but this many checkpoints of one container; 0 for no limit")
	f.DurationVar(&c.GCInterval, "gc-interval", 5*time.Minute, "time between two removals of old checkpoints")
	f.DurationVar(&c.ReadyTimeout, "ready-timeout", time.Minute, "tell systemd that the daemon is ready after this long without containerd or CRIU")
	f.BoolVar(&c.InhibitShutdown, "inhibit-shutdown", false, "hold up a shutdown of the node, by way of systemd-logind, until its containers are dumped")
	f.StringVar(&c.KubeletUnit, "kubelet-unit", "kubelet.service", "systemd unit of the kubelet, which is stopped before the containers are dumped at a shutdown")
	f.StringVar(&c.ContainerdState, "containerd-state", "/run/containerd", "containerd's state directory")
	f.StringVar(&c.MetricsAddress, "metrics-address", "", "TCP address to serve /metrics and /healthz on; empty for none")
	f.StringVar(&memory, "memory", string(checkpoint.MemoryLazy), "lazy: restored containers of 32 MiB and more run while their memory is filled; eager: afterwards; mapped: clones of Java virtual machines share the memory of their template, all else is lazy; annotation "+checkpoint.AnnotationMemory+" overrides it")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	cmd.SetArgs(args)
	return cmd.ExecuteContext(ctx)
}

func setupLog(level, format string) error {
	l, err := logrus.ParseLevel(level)
	if err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	logrus.SetLevel(l)
	return log.SetFormat(log.OutputFormat(format))
}
