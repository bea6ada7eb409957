package reboot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/ttrpc"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/control"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

const (
	// tasksDir is where containerd keeps the bundles, by namespace and ID, below
	// its state directory.
	tasksDir = "io.containerd.runtime.v2.task"

	maxSpecBytes      = 16 << 20
	maxBootstrapBytes = 64 << 10
)

// Container is an opted-in container of this node, as its bundle tells.
type Container struct {
	Namespace string // containerd's
	ID        string
	Bundle    string // absolute path
	Identity  checkpoint.Identity
	PodName   string
	PodUID    string
	// Err says why nothing more is known: it may have opted in or not.
	Err error
}

// Find lists the containers whose bundles say that they opted in, sorted by
// namespace and ID. state is containerd's state directory, which must exist.
// A bundle that goes meanwhile is left out.
func Find(ctx context.Context, state string) ([]Container, error) {
	files := fsys.OS{}
	if _, err := files.Lstat(state); err != nil {
		return nil, fmt.Errorf("containerd's state directory: %w", err)
	}
	top := filepath.Join(state, tasksDir)
	spaces, err := files.ReadDir(top)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bundles: %w", err)
	}
	var found []Container
	for _, ns := range spaces {
		bundles, err := files.ReadDir(filepath.Join(top, ns.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("bundles: %w", err)
		}
		for _, b := range bundles {
			if err := ctx.Err(); err != nil {
				return nil, context.Cause(ctx)
			}
			c := Container{Namespace: ns.Name(), ID: b.Name(), Bundle: filepath.Join(top, ns.Name(), b.Name())}
			if !containerID(c.ID) {
				continue // containerd makes no such names
			}
			if c.Err = c.read(); errors.Is(c.Err, errNotOptedIn) || errors.Is(c.Err, fs.ErrNotExist) {
				continue
			}
			found = append(found, c)
		}
	}
	return found, nil
}

var errNotOptedIn = errors.New("not opted in")

// read takes what the bundle's spec says.
func (c *Container) read() error {
	b, err := fsys.ReadFile(fsys.OS{}, filepath.Join(c.Bundle, "config.json"), maxSpecBytes)
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(b, &spec); err != nil {
		return fmt.Errorf("bundle: config.json: %w", err)
	}
	a := spec.Annotations
	if _, ok := a[checkpoint.InternalPolicy]; !ok {
		return errNotOptedIn
	}
	c.PodName, c.PodUID = truncate(a[checkpoint.CRISandboxName], 253), truncate(a[checkpoint.CRISandboxUID], 253)
	i := checkpoint.Identity{Namespace: a[checkpoint.CRISandboxNamespace], Key: a[checkpoint.InternalKey], Container: a[checkpoint.CRIContainerName]}
	if err := i.Validate(); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	c.Identity = i
	return nil
}

// socket is the path of the shim's socket.
func (c *Container) socket() (string, error) {
	b, err := fsys.ReadFile(fsys.OS{}, filepath.Join(c.Bundle, "bootstrap.json"), maxBootstrapBytes)
	if err != nil {
		return "", err
	}
	var p struct {
		Address  string `json:"address"`
		Protocol string `json:"protocol"`
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return "", fmt.Errorf("bootstrap.json: %w", err)
	}
	if p.Protocol != "ttrpc" {
		return "", fmt.Errorf("its shim speaks %.32q, not ttrpc: %w", p.Protocol, checkpoint.ErrInvalid)
	}
	path, isUnix := strings.CutPrefix(p.Address, "unix://")
	if !isUnix || !filepath.IsAbs(path) || filepath.Clean(path) != path || strings.ContainsRune(path, 0) {
		return "", fmt.Errorf("the address of its shim, %.64q, is no unix socket's: %w", p.Address, checkpoint.ErrInvalid)
	}
	return path, nil
}

// call has one conversation with the container's shim by the control service.
func (c *Container) call(ctx context.Context, talk func(context.Context, control.Client) error) error {
	return c.connect(ctx, func(ctx context.Context, t *ttrpc.Client) error { return talk(ctx, control.NewClient(t)) })
}

// connect connects to the container's shim for one conversation.
func (c *Container) connect(ctx context.Context, talk func(context.Context, *ttrpc.Client) error) error {
	path, err := c.socket()
	if err != nil {
		return fmt.Errorf("find the shim: %w", err)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("connect to the shim: %w", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	return talk(namespaces.WithNamespace(ctx, c.Namespace), client)
}

// Status asks the container's shim.
func (c *Container) Status(ctx context.Context) (s control.Status, err error) {
	err = c.call(ctx, func(ctx context.Context, shim control.Client) error {
		s, err = shim.Status(ctx, c.ID)
		return err
	})
	return s, err
}

// Snapshot asks the container's shim to make a version of a template, see
// [control.Server].
func (c *Container) Snapshot(ctx context.Context, template string) (r control.Result, err error) {
	err = c.call(ctx, func(ctx context.Context, shim control.Client) error {
		r, err = shim.Snapshot(ctx, c.ID, template)
		return err
	})
	return r, err
}

// Promote asks the container's shim to make a template of it if there is none, see
// [control.Server].
func (c *Container) Promote(ctx context.Context) (p control.Promotion, err error) {
	err = c.call(ctx, func(ctx context.Context, shim control.Client) error {
		p, err = shim.Promote(ctx, c.ID)
		return err
	})
	return p, err
}

// Run asks the container's shim to run a command in it, see [control.Server].
func (c *Container) Run(ctx context.Context, args []string) (r control.RunResult, err error) {
	err = c.call(ctx, func(ctx context.Context, shim control.Client) error {
		r, err = shim.Run(ctx, c.ID, args)
		return err
	})
	return r, err
}
