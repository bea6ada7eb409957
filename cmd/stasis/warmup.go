package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/podnet"
	"github.com/stasis-containers/stasis/pkg/checkpoint/reboot"
)

// warmup is what a container does before it is dumped.
type warmup struct {
	exec, url []string // as the user wrote them
	count     int
	timeout   time.Duration // of one step

	steps []warmupStep
}

// warmupStep is one command or one request.
type warmupStep struct {
	name string
	args []string // of a command
	url  *url.URL // of a request
}

// maxWarmups bounds --warmup-count.
const maxWarmups = 1_000_000

// parse checks what the user wrote.
func (w *warmup) parse() error {
	if w.count < 1 || w.count > maxWarmups {
		return usageError{fmt.Errorf("--warmup-count %d: want 1 to %d", w.count, maxWarmups)}
	}
	if w.timeout <= 0 {
		return usageError{errors.New("--warmup-timeout: want more than nothing")}
	}
	for _, command := range w.exec {
		args, err := checkpoint.ParseCommand(command)
		if err != nil {
			return usageError{fmt.Errorf("--warmup-exec: %w", err)}
		}
		w.steps = append(w.steps, warmupStep{name: command, args: args})
	}
	for _, raw := range w.url {
		u, err := podnet.ParseURL(raw)
		if err != nil {
			return usageError{fmt.Errorf("--warmup-url: %w", err)}
		}
		w.steps = append(w.steps, warmupStep{name: raw, url: u})
	}
	return nil
}

// run warms the container up. Until ready every step is tried until it works
// for the first time; afterwards a failure ends the warm-up.
func (w *warmup) run(ctx context.Context, ctr *reboot.Container, ready time.Time, every time.Duration, progress func(string)) error {
	if len(w.steps) == 0 {
		return nil
	}
	var network *podnet.Network
	if len(w.url) > 0 {
		var err error
		if network, err = networkOf(ctx, ctr); err != nil {
			return err
		}
		defer network.Close() // before the dump: its connections are not to be in it
	}
	begin, told := time.Now(), time.Now()
	for i := range w.count {
		for _, step := range w.steps {
			for {
				err := w.try(ctx, ctr, network, step)
				if err == nil {
					break
				}
				if ctx.Err() != nil {
					return fmt.Errorf("%w: no template was made", errInterrupted)
				}
				// A container that is gone will never be ready.
				if i > 0 || time.Now().After(ready) || errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
					return fmt.Errorf("warm-up: %s: %w; no template was made", step.name, err)
				}
				if time.Since(told) > 5*time.Second {
					told = time.Now()
					progress(fmt.Sprintf("not ready: %s: %v", step.name, err))
				}
				select {
				case <-ctx.Done():
				case <-time.After(every):
				}
			}
		}
		if time.Since(told) > 5*time.Second {
			told = time.Now()
			progress(fmt.Sprintf("warm-up: %d of %d", i+1, w.count))
		}
	}
	progress(fmt.Sprintf("warmed up, %d times in %s", w.count, time.Since(begin).Round(time.Millisecond)))
	return nil
}

// try takes one step once.
func (w *warmup) try(ctx context.Context, ctr *reboot.Container, network *podnet.Network, step warmupStep) error {
	late := fmt.Errorf("not done after %s: %w", w.timeout, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, w.timeout, late)
	defer cancel()
	if step.url != nil {
		status, err := network.Get(ctx, step.url)
		switch {
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return err
		case status < 200 || status >= 400:
			return fmt.Errorf("answer %d", status)
		}
		return nil
	}
	r, err := ctr.Run(ctx, step.args)
	switch {
	case errdefs.IsDeadlineExceeded(err): // the shim's clock may be the faster one
		return late
	case errdefs.IsNotImplemented(err):
		return fmt.Errorf("its shim is of an older release; create the pod again: %w", errdefs.ErrFailedPrecondition)
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case r.ExitStatus != 0:
		return fmt.Errorf("exit code %d: %s", r.ExitStatus, r.Output)
	}
	return nil
}

// networkOf opens the network of a container's pod. It asks for the process
// twice: in between its number may have become another one's.
func networkOf(ctx context.Context, ctr *reboot.Container) (*podnet.Network, error) {
	pid := func() (int, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		st, err := ctr.Status(ctx)
		if err == nil && (st.State != control.Running && st.State != control.Busy || st.PID == 0) {
			err = fmt.Errorf("it is %s: %w", st.State, errdefs.ErrFailedPrecondition)
		}
		return st.PID, err
	}
	before, err := pid()
	if err != nil {
		return nil, err
	}
	network, err := podnet.Open(before)
	if err != nil {
		return nil, err
	}
	after, err := pid()
	if err == nil && after != before {
		err = fmt.Errorf("it was started again: %w", errdefs.ErrUnavailable)
	}
	if err != nil {
		network.Close()
		return nil, err
	}
	return network, nil
}
