package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

func (c *cli) prepareRebootCommand() *cobra.Command {
	var dryRun, abort, stop, ignore bool
	var unit string
	n := &reboot.Node{}
	o := reboot.Options{}
	cmd := &cobra.Command{
		Use:   "prepare-reboot",
		Short: "Dump all opted-in containers and leave them frozen, so that the node may reboot",
		Long: `prepare-reboot freezes every opted-in container of this node (policy reboot or
resume), dumps it, and leaves it frozen. Then it writes the node manifest. After
the reboot each container goes on when the kubelet creates it again.

The kubelet must not run meanwhile: its probes would kill frozen containers.
Stop it first, or let this command do it. Where neither is right, as on a node
without a kubelet, --ignore-kubelet skips the question.

A container that cannot be dumped runs on, and starts cold after the reboot.
Called again, the command completes what is missing. --abort undoes it:
everything goes on, and the kubelet is started again if this command had stopped
it. --dry-run freezes nothing; it predicts sizes and time, and tells what cannot
be dumped.

A signal ends the waiting. What is dumped then stays frozen and dumped.`,
		Example: `  stasis prepare-reboot --dry-run
  stasis prepare-reboot --stop-kubelet && reboot
  stasis prepare-reboot --abort
  stasis prepare-reboot -o json | jq '.containers[] | select(.result != "dumped")'`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case stop && ignore:
				return usageError{errors.New("--stop-kubelet and --ignore-kubelet exclude each other")}
			case dryRun && abort:
				return usageError{errors.New("--dry-run and --abort exclude each other")}
			case o.Kill && (dryRun || abort):
				return usageError{errors.New("--kill goes with neither --dry-run nor --abort")}
			case o.Timeout <= 0:
				return usageError{fmt.Errorf("--timeout %v: want more than nothing", o.Timeout)}
			case stop:
				o.Kubelet = reboot.StopKubelet
			case ignore:
				o.Kubelet = reboot.IgnoreKubelet
			}
			if _, err := c.open(); err != nil {
				return err
			}
			n.Root, n.Kubelet = c.root, reboot.HostKubelet(unit)
			n.Missed = c.missed
			switch {
			case dryRun:
				return c.predictReboot(cmd.Context(), n, o.BestEffort)
			case abort:
				return c.abortReboot(cmd.Context(), n)
			}
			return c.prepareReboot(cmd.Context(), n, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "only predict sizes and time, and tell what cannot be dumped")
	f.BoolVar(&abort, "abort", false, "undo a preparation: let every container go on")
	f.BoolVar(&stop, "stop-kubelet", false, "stop the kubelet first")
	f.BoolVar(&ignore, "ignore-kubelet", false, "do not ask whether a kubelet runs")
	f.StringVar(&unit, "kubelet-unit", "kubelet.service", "systemd unit of the kubelet")
	f.DurationVar(&o.Timeout, "timeout", 5*time.Minute, "how long all dumps may take together")
	f.BoolVar(&o.BestEffort, "best-effort", false, "succeed though containers are not dumped, and begin though the store has too little room")
	f.BoolVar(&o.Kill, "kill", false, "kill what is dumped in the end; for a node that goes down for certain")
	f.StringVar(&n.ContainerdState, "containerd-state", "/run/containerd", "containerd's state directory")
	return cmd
}

// preparedJSON is the machine-readable form of a preparation.
type preparedJSON struct {
	*reboot.Manifest
	Complete bool `json:"complete"`
}

func (c *cli) prepareReboot(ctx context.Context, n *reboot.Node, o reboot.Options) error {
	p := progress{c: c, terminal: isTerminal(c.err)}
	o.Progress = p.container
	m, err := n.Prepare(ctx, o)
	p.end()
	if errors.Is(err, reboot.ErrKubelet) && o.Kubelet == reboot.RefuseKubelet {
		return fmt.Errorf("%w; stop it (systemctl stop %s), or give --stop-kubelet or --ignore-kubelet", err, n.Kubelet.Unit())
	}
	if errors.Is(err, checkpoint.ErrNoSpace) {
		return fmt.Errorf("%w; nothing was frozen; stasis gc makes room, and --best-effort dumps what fits", err)
	}
	if m == nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: nothing was frozen", errInterrupted)
		}
		return err
	}
	if perr := c.printPrepared(m); perr != nil {
		return perr
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: what is dumped stays frozen, and dumps in progress may still end so; stasis prepare-reboot completes the rest, stasis prepare-reboot --abort lets all go on", errInterrupted)
	}
	if err != nil {
		return err
	}
	if !m.Complete() && !o.BestEffort {
		return errors.New("not all containers are dumped, and those that are stay frozen; stasis prepare-reboot tries the rest again, stasis prepare-reboot --abort lets all go on")
	}
	if o.Kill {
		fmt.Fprintln(c.err, "The node may reboot now. What is dumped is killed, and goes on when it is created again.")
		return nil
	}
	fmt.Fprintln(c.err, "The node may reboot now; stasis prepare-reboot --abort lets all containers go on instead.")
	return nil
}

func (c *cli) printPrepared(m *reboot.Manifest) error {
	if c.output == "json" {
		return c.printJSON(preparedJSON{m, m.Complete()})
	}
	t := newTable(c.out, "CONTAINER", "POD", "RESULT", "SIZE", "TOOK", "REASON")
	var bytes int64
	dumped := 0
	for _, e := range m.Containers {
		row := []string{e.Name(), e.PodName, string(e.Result), "", "", e.Reason}
		if e.Result == reboot.Dumped {
			row[3], row[4] = size(e.SizeBytes), e.Duration.Round(100*time.Microsecond).String()
			bytes += e.SizeBytes
			dumped++
		}
		t.row(row...)
	}
	if err := t.flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.out, "%d of %d containers dumped, %s\n", dumped, len(m.Containers), size(bytes))
	return err
}

func (c *cli) abortReboot(ctx context.Context, n *reboot.Node) error {
	a, err := n.Abort(ctx)
	if a == nil {
		return err
	}
	if c.output == "json" {
		err = errors.Join(err, c.printJSON(a))
	} else {
		for _, e := range a.Containers {
			what := "runs on"
			if e.Result == reboot.Failed {
				what = "failed: " + e.Reason
			}
			fmt.Fprintf(c.out, "%s  %s\n", clean(e.Name()), clean(what))
		}
	}
	switch {
	case a.StartedKubelet != "":
		fmt.Fprintf(c.err, "%s is started again.\n", clean(a.StartedKubelet))
	default:
		fmt.Fprintf(c.err, "If the kubelet was stopped for this, start it: systemctl start %s\n", n.Kubelet.Unit())
	}
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", errInterrupted, err)
	}
	return err
}

// progress tells of containers as they are done.
type progress struct {
	c        *cli
	terminal bool
}

func (p *progress) container(done, total int, e reboot.Entry) {
	what := fmt.Sprintf("%s, %s in %s", e.Result, size(e.SizeBytes), e.Duration.Round(time.Millisecond))
	if e.Result != reboot.Dumped {
		what = fmt.Sprintf("%s: %s", e.Result, e.Reason)
	}
	p.end()
	digits := len(strconv.Itoa(total))
	fmt.Fprintf(p.c.err, "[%*d/%d] %s  %s\n", digits, done, total, clean(e.Name()), clean(what))
	if p.terminal && done < total {
		fmt.Fprintf(p.c.err, "%d of %d are done ...", done, total)
	}
}

// end takes the counter away.
func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.c.err, "\r\x1b[K")
	}
}
