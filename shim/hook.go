package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// After a restore the pod may have a hook run, see [checkpoint.ParseHook]: when
// the container's tasks run, and before Start answers. Until then nobody else
// gets at the container, who asks for it waits: to containerd it is not started.
//
// Where the hook fails the container is killed, and another one is started cold
// in its place, as after a restore that failed. But this one has run. It may have
// written to its output, whose end containerd would see when it is gone, and read
// no more; see [holdOutput]. And its checkpoint, unless it is a template, must not
// be restored a second time: it is quarantined.

// errHook is in the error of a hook that failed.
var errHook = errors.New("the hook after the restore failed")

// maxHookOutput is how much of a failed command's output, its end, is told.
const maxHookOutput = 512

// afterRestore runs the container's hook, if it has one, as a phase of the restore.
func (s *service) afterRestore(ctx context.Context, c *container, l *lazyRestore, p *pendingRestore) error {
	if c.settings.AfterRestore == "" {
		return nil
	}
	begin := time.Now()
	err := s.runHook(ctx, c, l)
	took := time.Since(begin)
	p.phase("hook", took)
	if err != nil {
		return fmt.Errorf("%w after %v: %s: %w", errHook, took.Round(time.Millisecond), c.settings.AfterRestore, err)
	}
	log.G(ctx).WithFields(log.Fields{"op": "hook", "duration_ms": took.Milliseconds()}).Info("hook after the restore")
	return nil
}

func (s *service) runHook(ctx context.Context, c *container, l *lazyRestore) error {
	hook, err := checkpoint.ParseHook(c.settings.AfterRestore)
	if err != nil {
		return err
	}
	// A caller that goes away is not asked: the hook is short, and half of one
	// would be worse.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), s.config.HookTimeout, fmt.Errorf("not done after %v", s.config.HookTimeout))
	defer cancel()
	if l != nil {
		var end context.CancelCauseFunc
		ctx, end = context.WithCancelCause(ctx)
		defer end(nil)
		go func() { // ends with ctx
			// Nobody waits for memory that does not come.
			if err := l.pager.Wait(ctx); err != nil {
				end(fmt.Errorf("memory: %w", err))
			}
		}()
	}
	if hook.Signal != 0 {
		_, err := s.TTRPCTaskService.Kill(ctx, &taskAPI.KillRequest{ID: c.id, Signal: uint32(hook.Signal)})
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return errgrpc.ToNative(err)
	}
	r, err := s.exec(ctx, c, hook.Args)
	if err == nil && r.ExitStatus != 0 {
		err = fmt.Errorf("exit code %d", r.ExitStatus)
	}
	if out := r.Output; err != nil && out != "" {
		// It may be anything, and gets into logs and onto terminals.
		err = fmt.Errorf("%w: %q", err, out[max(0, len(out)-maxHookOutput):])
	}
	return err
}

// noSuccessor tells why no other container can be started in the same call in
// the place of one that has run; nil where that is possible.
func noSuccessor(c *container, outputs error) error {
	if c.request.Stdin != "" || c.request.Terminal {
		return errors.New("it has an input, which its successor could not take over")
	}
	return outputs
}

// holdOutput keeps the FIFOs of a container's output open at both ends. The inner
// service closes them once the container is dead and what it wrote is copied:
// containerd would take that for the end of the output, and the successor would
// wait for a reader that never comes.
func holdOutput(r *taskAPI.CreateTaskRequest) (release func(), err error) {
	var held []*os.File
	release = func() {
		for _, f := range held {
			f.Close()
		}
	}
	for _, name := range []string{r.Stdout, r.Stderr} {
		if !filepath.IsAbs(name) {
			continue // none, or a URI: nothing of containerd reads there
		}
		f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
		if err != nil {
			return release, fmt.Errorf("hold output: %w", err)
		}
		held = append(held, f)
	}
	return release, nil
}

// deleteStarted kills a container that runs, or has run, and removes the inner
// object of it.
func (s *service) deleteStarted(ctx context.Context, id string) error {
	if err := s.kill(ctx, &taskAPI.KillRequest{ID: id, Signal: uint32(unix.SIGKILL), All: true}); err != nil {
		return err
	}
	if _, err := s.TTRPCTaskService.Wait(ctx, &taskAPI.WaitRequest{ID: id}); err != nil {
		return err
	}
	_, err := s.TTRPCTaskService.Delete(ctx, &taskAPI.DeleteRequest{ID: id})
	return err
}
