// Package control is the private service by which the CLI and the daemon ask a
// shim to dump a container without stopping it, for a reboot or as a template, and
// to let it go on, or to run a command in it. Each shim serves it on the socket on which it
// serves the task service.
//
// Invariants:
//
//   - A container for which Prepare succeeded is frozen and has a committed
//     checkpoint; it leaves that state by Abort, which removes the checkpoint
//     before it thaws, or by its death.
//   - A container for which Prepare failed runs on as before.
//   - Each call is idempotent, except for Snapshot and Run.
//   - After Snapshot and Promote, with whatever result, the container runs on as
//     before.
//
// Messages are JSON within one protobuf field: both ends are of one release,
// and a reader ignores fields that it does not know.
package control

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// service is the name on the wire.
const service = "stasis.v1.Control"

// maxMessage bounds a message, in bytes.
const maxMessage = 64 << 10

// State is what a container does as far as dumps are concerned.
type State string

const (
	Running  State = "running"  // may be prepared
	Prepared State = "prepared" // frozen, with a committed checkpoint
	Busy     State = "busy"     // a dump or a CRI checkpoint is in progress
	Stopped  State = "stopped"  // not started, or dead
)

// Status describes one container.
type Status struct {
	State State `json:"state"`
	// Identity and Settings are those of an opted-in container.
	Identity checkpoint.Identity `json:"identity"`
	Settings checkpoint.Settings `json:"settings"`
	PodName  string              `json:"podName"`
	PodUID   string              `json:"podUID"`
	// PID is that of the first process, 0 unless running or prepared.
	PID int `json:"pid"`
	// MemoryBytes is an upper bound of what a dump writes for the processes.
	MemoryBytes int64 `json:"memoryBytes"`
	// CheckpointID is set where the state is Prepared.
	CheckpointID checkpoint.ID `json:"checkpointID,omitempty"`
}

// Result is a finished Prepare.
type Result struct {
	CheckpointID checkpoint.ID      `json:"checkpointID"`
	SizeBytes    int64              `json:"sizeBytes"`
	Duration     time.Duration      `json:"duration"` // nanoseconds, waiting for a slot included
	Timings      checkpoint.Timings `json:"timings"`
	// Already: an earlier Prepare had done it.
	Already bool `json:"already,omitempty"`
}

// Server is what a shim implements. Its errors cross the wire with their
// errdefs class and text. A container that is not known, or that did not opt
// in, is errdefs.ErrNotFound.
type Server interface {
	Status(ctx context.Context, containerID string) (Status, error)
	// Prepare freezes the container, waits for a dump slot of the node, dumps
	// and commits, and leaves it frozen. It ends by ctx's deadline.
	Prepare(ctx context.Context, containerID string) (Result, error)
	// Abort removes the checkpoint and thaws; nothing to do is no error.
	Abort(ctx context.Context, containerID string) error
	// Snapshot dumps the container, lets it run on, and commits the dump as the
	// newest version of a template of the container's namespace. It ends by
	// ctx's deadline.
	Snapshot(ctx context.Context, containerID, template string) (Result, error)
	// Promote is Snapshot for the template that the container's own pod names, if
	// the container began without a checkpoint and there is no version of it yet
	// from which another one like it would begin.
	Promote(ctx context.Context, containerID string) (Promotion, error)
	// Run runs a command in the container, as the container's own user, and
	// returns when it has exited. The end of ctx kills the command.
	Run(ctx context.Context, containerID string, args []string) (RunResult, error)
}

// Promotion is what came of a Promote.
type Promotion struct {
	Result // Already: such a version was there
	// Skipped says why nothing is to be done; then there is no Result.
	Skipped string `json:"skipped,omitempty"`
}

// RunResult is how a command ended.
type RunResult struct {
	ExitStatus uint32 `json:"exitStatus"` // 128 and more for a signal
	// Output is the end of what it wrote to stdout and stderr, without white
	// space around it.
	Output string `json:"output,omitempty"`
}

// runRequest is the message of Run.
type runRequest struct {
	ContainerID string   `json:"containerID"`
	Args        []string `json:"args"`
}

// snapshotRequest is the message of Snapshot.
type snapshotRequest struct {
	ContainerID string `json:"containerID"`
	Template    string `json:"template"`
}

// Register adds the service to a shim's server.
func Register(server *ttrpc.Server, s Server) {
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Status":  method(s.Status),
		"Prepare": method(s.Prepare),
		"Abort": method(func(ctx context.Context, id string) (struct{}, error) {
			return struct{}{}, s.Abort(ctx, id)
		}),
		"Snapshot": method(func(ctx context.Context, request string) (Result, error) {
			var r snapshotRequest
			if err := json.Unmarshal([]byte(request), &r); err != nil {
				return Result{}, fmt.Errorf("snapshot: %w: %w", checkpoint.ErrInvalid, err)
			}
			return s.Snapshot(ctx, r.ContainerID, r.Template)
		}),
		"Promote": method(s.Promote),
		"Run": method(func(ctx context.Context, request string) (RunResult, error) {
			var r runRequest
			if err := json.Unmarshal([]byte(request), &r); err != nil {
				return RunResult{}, fmt.Errorf("run: %w: %w", checkpoint.ErrInvalid, err)
			}
			return s.Run(ctx, r.ContainerID, r.Args)
		}),
	}})
}

func method[T any](call func(context.Context, string) (T, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		var id wrapperspb.StringValue
		if err := unmarshal(&id); err != nil {
			return nil, err
		}
		v, err := call(ctx, id.Value)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		b, err := json.Marshal(v)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		return wrapperspb.Bytes(b), nil
	}
}

// Client calls the service of one shim.
type Client struct{ t *ttrpc.Client }

// NewClient returns a client on a connection that the caller made and closes.
func NewClient(t *ttrpc.Client) Client { return Client{t} }

// Status calls [Server.Status]. A shim without this service, of an older
// release or another runtime, answers errdefs.ErrNotImplemented.
func (c Client) Status(ctx context.Context, id string) (Status, error) {
	return call[Status](ctx, c, "Status", id)
}

// Prepare calls [Server.Prepare].
func (c Client) Prepare(ctx context.Context, id string) (Result, error) {
	return call[Result](ctx, c, "Prepare", id)
}

// Abort calls [Server.Abort].
func (c Client) Abort(ctx context.Context, id string) error {
	_, err := call[struct{}](ctx, c, "Abort", id)
	return err
}

// Snapshot calls [Server.Snapshot].
func (c Client) Snapshot(ctx context.Context, id, template string) (Result, error) {
	request, err := json.Marshal(snapshotRequest{id, template})
	if err != nil {
		return Result{}, fmt.Errorf("snapshot of container %s: %w", id, err)
	}
	return call[Result](ctx, c, "Snapshot", string(request))
}

// Promote calls [Server.Promote].
func (c Client) Promote(ctx context.Context, id string) (Promotion, error) {
	return call[Promotion](ctx, c, "Promote", id)
}

// Run calls [Server.Run].
func (c Client) Run(ctx context.Context, id string, args []string) (RunResult, error) {
	request, err := json.Marshal(runRequest{id, args})
	if err != nil {
		return RunResult{}, fmt.Errorf("run in container %s: %w", id, err)
	}
	return call[RunResult](ctx, c, "Run", string(request))
}

func call[T any](ctx context.Context, c Client, name, request string) (v T, err error) {
	var answer wrapperspb.BytesValue
	if err := c.t.Call(ctx, service, name, wrapperspb.String(request), &answer); err != nil {
		return v, errgrpc.ToNative(err)
	}
	if len(answer.Value) > maxMessage {
		return v, fmt.Errorf("%s: an answer of %d bytes", name, len(answer.Value))
	}
	if err := json.Unmarshal(answer.Value, &v); err != nil {
		return v, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}
