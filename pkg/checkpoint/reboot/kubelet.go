package reboot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/util"
)

// Kubelet is the one thing that must not run while containers are frozen.
type Kubelet interface {
	// Unit is its name for whoever has to start it again.
	Unit() string
	// Running says what runs, in words; empty if nothing does.
	Running(ctx context.Context) (string, error)
	// Stop returns when it has ended; Start when it has been asked to begin.
	Stop(ctx context.Context) error
	Start(ctx context.Context) error
}

// ErrKubelet: a kubelet runs, or nobody can tell whether it does.
var ErrKubelet = errors.New("the kubelet must not run")

// ErrNoSystemd: the node has another init.
var ErrNoSystemd = errors.New("systemd does not run this node")

// HostKubelet is this node's kubelet as a systemd unit and, whatever starts it,
// as a process of that name.
func HostKubelet(unit string) Kubelet { return &hostKubelet{unit: unit, proc: "/proc"} }

type hostKubelet struct{ unit, proc string }

func (k *hostKubelet) Unit() string { return k.unit }

func (k *hostKubelet) Running(ctx context.Context) (string, error) {
	switch state, err := UnitProperty(ctx, k.unit, "Unit", "ActiveState"); {
	case errors.Is(err, ErrNoSystemd):
	case err != nil:
		return "", err
	case state != "inactive" && state != "failed":
		return fmt.Sprintf("%s is %s", k.unit, state), nil
	}
	return k.process()
}

// process looks for a process named kubelet. One in another pid namespace is
// somebody else's, that of a node in a container for example.
func (k *hostKubelet) process() (string, error) {
	entries, err := os.ReadDir(k.proc)
	if err != nil {
		return "", err
	}
	own, err := os.Readlink(filepath.Join(k.proc, "self/ns/pid"))
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(k.proc, e.Name(), "comm"))
		if err != nil || !bytes.Equal(bytes.TrimSpace(comm), []byte("kubelet")) {
			continue // most likely it has ended
		}
		if ns, err := os.Readlink(filepath.Join(k.proc, e.Name(), "ns/pid")); err == nil && ns == own {
			return "process " + e.Name() + " is a kubelet", nil
		}
	}
	return "", nil
}

func (k *hostKubelet) Stop(ctx context.Context) error {
	err := withSystemd(ctx, func(c *dbus.Conn) error {
		if _, err := c.StopUnitContext(ctx, k.unit, "replace", nil); err != nil {
			return err
		}
		for {
			state, err := activeState(ctx, c, k.unit)
			if err != nil || state == "inactive" || state == "failed" {
				return err
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("it is still %s: %w", state, context.Cause(ctx))
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	if err != nil {
		return fmt.Errorf("stop %s: %w", k.unit, err)
	}
	return nil
}

func (k *hostKubelet) Start(ctx context.Context) error {
	err := withSystemd(ctx, func(c *dbus.Conn) error {
		_, err := c.StartUnitContext(ctx, k.unit, "replace", nil)
		return err
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", k.unit, err)
	}
	return nil
}

// withSystemd talks to systemd on its own socket, which is there while the bus
// is not yet or no more, or else on the bus.
func withSystemd(ctx context.Context, talk func(*dbus.Conn) error) error {
	if !util.IsRunningSystemd() {
		return ErrNoSystemd
	}
	ctx, cancel := context.WithCancel(ctx) // ends the connection as well
	defer cancel()
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		var busErr error
		if c, busErr = dbus.NewSystemConnectionContext(ctx); busErr != nil {
			return fmt.Errorf("connect to systemd: %w", errors.Join(err, busErr))
		}
	}
	defer c.Close()
	return talk(c)
}

func activeState(ctx context.Context, c *dbus.Conn, unit string) (string, error) {
	return property(ctx, c, unit, "Unit", "ActiveState")
}

func property(ctx context.Context, c *dbus.Conn, unit, kind, name string) (string, error) {
	p, err := c.GetUnitTypePropertyContext(ctx, unit, kind, name)
	if err != nil {
		return "", fmt.Errorf("%s: %s: %w", unit, name, err)
	}
	s, ok := p.Value.Value().(string)
	if !ok {
		return "", fmt.Errorf("%s: %s is no text", unit, name)
	}
	return s, nil
}

// UnitProperty is a text that systemd knows of a unit, of kind "Unit" or
// "Service". It fails with [ErrNoSystemd] where there is none.
func UnitProperty(ctx context.Context, unit, kind, name string) (value string, err error) {
	err = withSystemd(ctx, func(c *dbus.Conn) error {
		value, err = property(ctx, c, unit, kind, name)
		return err
	})
	return value, err
}
