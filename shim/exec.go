package shim

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
)

// maxExecOutput is how much of a command's output is kept, its end.
const maxExecOutput = 2 << 10

// Run implements [control.Server].
func (s *service) Run(ctx context.Context, id string, args []string) (control.RunResult, error) {
	c, err := s.enrolled(ctx, id)
	if err == nil {
		_, err = s.free(ctx, id)
	}
	if err != nil {
		return control.RunResult{}, errgrpc.ToNative(err)
	}
	r, err := s.exec(ctx, c, args)
	if err != nil {
		return control.RunResult{}, fmt.Errorf("exec in container %s: %w", id, err)
	}
	return r, nil
}

// exec runs a command in a container that runs, as the container's own process
// is run: with its user, capabilities, environment and so on. When ctx ends the
// command is killed, and that is an error.
func (s *service) exec(ctx context.Context, c *container, args []string) (r control.RunResult, err error) {
	if len(args) == 0 || args[0] == "" || c.spec == nil || c.spec.Process == nil {
		return r, fmt.Errorf("no command: %w", checkpoint.ErrInvalid)
	}
	process := *c.spec.Process
	process.Args, process.CommandLine, process.Terminal, process.ConsoleSize = args, "", false, nil
	spec, err := typeurl.MarshalAnyToProto(&process)
	if err != nil {
		return r, err
	}
	var random [8]byte
	rand.Read(random[:]) // never fails, see crypto/rand
	execID := "stasis-" + hex.EncodeToString(random[:])
	out, err := openOutput(filepath.Join(c.bundle, execID))
	if err != nil {
		return r, err
	}
	defer func() { r.Output = out.close() }()
	if _, err := s.TTRPCTaskService.Exec(ctx, &taskAPI.ExecProcessRequest{ID: c.id, ExecID: execID, Stdout: out.name, Stderr: out.name, Spec: spec}); err != nil {
		return r, errgrpc.ToNative(err)
	}
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
		defer cancel()
		_, derr := s.TTRPCTaskService.Delete(cleanup, &taskAPI.DeleteRequest{ID: c.id, ExecID: execID})
		if derr = errgrpc.ToNative(derr); derr != nil && !errdefs.IsNotFound(derr) {
			err = errors.Join(err, derr)
		}
	}()
	if _, err := s.TTRPCTaskService.Start(ctx, &taskAPI.StartRequest{ID: c.id, ExecID: execID}); err != nil {
		return r, errgrpc.ToNative(err)
	}
	wait := &taskAPI.WaitRequest{ID: c.id, ExecID: execID}
	exit, err := s.TTRPCTaskService.Wait(ctx, wait)
	if err == nil {
		r.ExitStatus = exit.ExitStatus
		return r, nil
	}
	err = errgrpc.ToNative(err)
	if ctx.Err() != nil {
		err = fmt.Errorf("killed: %w", context.Cause(ctx))
	}
	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.config.CleanupTimeout)
	defer cancel()
	_, kerr := s.TTRPCTaskService.Kill(cleanup, &taskAPI.KillRequest{ID: c.id, ExecID: execID, Signal: uint32(unix.SIGKILL)})
	if kerr = errgrpc.ToNative(kerr); kerr != nil && !errdefs.IsNotFound(kerr) {
		return r, errors.Join(err, kerr)
	}
	_, werr := s.TTRPCTaskService.Wait(cleanup, wait)
	return r, errors.Join(err, errgrpc.ToNative(werr))
}

// output is a FIFO whose reader keeps the end of what comes, and never stops
// reading: a command must not hang for what it says.
type output struct {
	name string
	r, w *os.File
	done chan struct{}
	end  []byte // read after done
}

func openOutput(name string) (*output, error) {
	if err := unix.Mkfifo(name, 0o600); err != nil {
		return nil, &os.PathError{Op: "mkfifo", Path: name, Err: err}
	}
	o := &output{name: name, done: make(chan struct{})}
	var err error
	if o.r, err = os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err == nil {
		// While there is a writer of one's own nobody sees the end.
		o.w, err = os.OpenFile(name, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		if o.r != nil {
			o.r.Close()
		}
		return nil, errors.Join(err, os.Remove(name))
	}
	go func() { // ends with close
		defer close(o.done)
		buf := make([]byte, 4096)
		for {
			n, err := o.r.Read(buf)
			o.end = append(o.end, buf[:n]...)
			if len(o.end) > maxExecOutput {
				o.end = append([]byte(nil), o.end[len(o.end)-maxExecOutput:]...)
			}
			if err != nil {
				return // the end, or the deadline of close
			}
		}
	}()
	return o, nil
}

// close returns what was kept. It does not wait for processes that the command
// left behind with the FIFO open.
func (o *output) close() string {
	o.w.Close()
	o.r.SetReadDeadline(time.Now().Add(time.Second)) // a FIFO has deadlines
	<-o.done
	o.r.Close()
	os.Remove(o.name) // else it goes with the bundle
	return strings.TrimSpace(strings.ToValidUTF8(string(o.end), "?"))
}
